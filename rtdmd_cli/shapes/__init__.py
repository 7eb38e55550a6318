"""The built-in world of small pictures: renderer, captions, prompt sets, detector, and its trained models."""
