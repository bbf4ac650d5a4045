"""What training would cost, predicted with no GPU and no weights."""
