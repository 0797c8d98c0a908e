"""The only package that imports Megatron: its runtime, our layer spec, and loading a base model."""
