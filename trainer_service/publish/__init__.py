"""Ways for adapter versions to reach a sampler."""
