"""`python -m trainer_service`."""

from trainer_service.cli import main

if __name__ == "__main__":
    main()
