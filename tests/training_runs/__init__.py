"""Training runs in miniature, made by the real libraries in processes of their own."""
