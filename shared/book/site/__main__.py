"""Builds the site: see build."""
import sys

from shared.book.site.build import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
