"""The prefill service: computes prompts, samples the first token, hands the state to a decode."""
