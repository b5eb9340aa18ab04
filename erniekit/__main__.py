"""`python -m erniekit` is the `erniekit` command."""

import sys

if __name__ == "__main__":
    if not (sys.version_info >= (3, 11) and sys.flags.safe_path):
        # The working directory: last, so that a json.py in it does not stand in for the library's.
        sys.path.append(sys.path.pop(0))
    from erniekit.cli.main import main

    sys.exit(main())
