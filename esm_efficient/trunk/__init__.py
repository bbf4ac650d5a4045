"""The frozen part of an encoder, computed once: split a model, cache the states, choose a layer, cut layers off."""
