"""The decisions, pure: no I/O, no clock, no global random numbers. Production and simulation call the same functions."""
