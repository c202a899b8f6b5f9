"""The paper's studies: which runs they are made of, running them, and what comes of them."""
