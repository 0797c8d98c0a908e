"""What both services share: errors, serving, logs, and how a base model and an adapter are described."""
