"""The paper's experiments: models, and what is measured on them."""
