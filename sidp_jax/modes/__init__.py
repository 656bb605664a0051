"""The ways to run a layer that a replica does not own, and the policy that picks one."""
