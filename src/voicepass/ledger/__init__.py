"""The only state: which conversation was issued to whom. A pass leaves the service only after its row is durable."""
