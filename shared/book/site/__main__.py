"""Build the site; see build."""

from shared.book.site.build import main
from shared.programs import run

if __name__ == "__main__":
    run(main)
