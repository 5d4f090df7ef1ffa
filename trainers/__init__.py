"""Training on top of transformers' Trainer and Accelerate: recipes and the parts they are made of."""
