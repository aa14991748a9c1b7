"""The models: one decoder built from a few layers."""
