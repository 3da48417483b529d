"""The laboratory: studies of gradient flow and learning on top of ``rnn_cuda``'s public API."""
