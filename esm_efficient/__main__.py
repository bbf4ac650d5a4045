"""``python -m esm_efficient``."""

from esm_efficient.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
