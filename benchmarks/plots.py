"""Plots."""


def draw_all(found, folder):
    return None
