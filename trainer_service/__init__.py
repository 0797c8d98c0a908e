"""The trainer: Megatron-Core holds one frozen base model, Tinkerbell's LoRA layers hold everybody's adapters.

Layers, each knowing only the next: server (proto in, proto out) -> trainer (order, publishing) -> executor (where it
runs) -> engine (the model and the adapters).
"""
