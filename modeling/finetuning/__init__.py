"""Finetuning: encoders with gradients and heads of stage 2 on raw pairs."""
