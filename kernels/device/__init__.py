"""The device at hand: which backend serves it, with which tile shapes and products."""
