"""`make bench`: the benchmarks of the front, one after the other. Each prints one JSON document."""

from __future__ import annotations

import sys

from ops.benchmarks import front

if __name__ == "__main__":
    front.main(sys.argv[1:])
