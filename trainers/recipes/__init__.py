"""One runnable module a method: `accelerate launch -m trainers.recipes.<name>`."""
