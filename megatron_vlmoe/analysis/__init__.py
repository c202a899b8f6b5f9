"""What runs did: reads the files that they leave, draws pictures and tables."""
