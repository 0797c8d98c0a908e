"""`python -m sampler_service`."""

from sampler_service.cli import main

if __name__ == "__main__":  # vLLM's children import this module again
    main()
