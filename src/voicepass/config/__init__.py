"""The operator's configuration: the environment and the policy file become the parts of the service."""
