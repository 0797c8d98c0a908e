"""Ways for adapter versions to reach the samplers, and what keeps every sampler current."""
