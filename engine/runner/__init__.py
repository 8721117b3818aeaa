"""Runs the steps that the scheduler plans: input tensors, model, sampler."""
