"""Plants the seeded bugs: see runner."""
import sys

from shared.book.traps.runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
