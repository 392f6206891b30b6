"""What ``loraplex bench`` measures: steps, prompts, served requests and adapter loads, with peers in the same run."""
