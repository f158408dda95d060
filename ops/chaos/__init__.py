"""`make chaos`: break everything in turn under load, then count. Bounded, and repeatable by seed.

Not covered: a full disk, skewed clocks (times are Redis' own), a cut between two hosts.
"""
