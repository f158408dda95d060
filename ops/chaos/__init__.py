"""`make chaos`: break everything in turn under load, then count. Bounded, and repeatable by seed.

What the machine does not allow (mounting a small disk, making network namespaces) is left out, and the table says so.
"""
