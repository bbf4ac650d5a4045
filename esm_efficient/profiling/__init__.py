"""What training costs, measured while it runs."""
