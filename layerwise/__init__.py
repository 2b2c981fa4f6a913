"""What the measures nc1 and dib stand on. Importing this package does not import torch."""
