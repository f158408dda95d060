"""stub: filled below"""
