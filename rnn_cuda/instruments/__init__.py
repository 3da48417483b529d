"""Measurements of gradient flow in recurrent layers."""
