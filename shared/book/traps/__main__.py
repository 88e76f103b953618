"""Plant the seeded bugs; see runner."""

from shared.book.traps.runner import main
from shared.programs import run

if __name__ == "__main__":
    run(main)
