"""`python -m erniekit`, or this file as a script of Paddle's launcher, is the `erniekit` command."""

import sys

if __name__ == "__main__":
    if not __package__ and not (sys.version_info >= (3, 11) and sys.flags.safe_path):
        del sys.path[0]  # remove this directory, whose modules are not top-level modules
    from erniekit.cli.main import main

    sys.exit(main())
