"""`python -m lpg_hf.commands`, for launchers and for a checkout that is not installed."""

from .main import main


if __name__ == "__main__":
    main()
