"""The slowest tests of a ctest run: python tools/slowest_tests.py RESULTS.xml [COUNT]

RESULTS.xml: what `ctest --output-junit` wrote.
"""

import sys
from xml.etree import ElementTree


def main(path: str, count: int = 15) -> None:
    """Prints seconds and names, the slowest first."""
    tests = ElementTree.parse(path).getroot().iter("testcase")
    seconds = sorted(((float(t.get("time", 0)), t.get("name")) for t in tests), reverse=True)
    print(f"slowest {min(count, len(seconds))} of {len(seconds)} tests:")
    for took, name in seconds[:count]:
        print(f"{took:8.2f} s  {name}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
