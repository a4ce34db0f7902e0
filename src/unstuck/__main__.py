"""`python -m unstuck`, as torchrun starts it."""

from unstuck.cli import main

if __name__ == "__main__":
    main()
