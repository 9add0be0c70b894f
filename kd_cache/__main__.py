"""``python -m kd_cache``: the command line, without the current folder among the places that modules come from."""

from kd_cache.cli import main

if __name__ == "__main__":
    main()
