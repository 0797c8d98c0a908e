"""Many LoRA adapters on one frozen model: their memory, and the layers that apply them."""
