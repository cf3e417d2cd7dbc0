"""``python -m st_clp`` is the command ``st-clp``."""

from st_clp.cli import main

if __name__ == "__main__":
    main()
