"""Fitting anchors and curves: objective, perturbation, step, loop, checkpoints, Trainer."""
