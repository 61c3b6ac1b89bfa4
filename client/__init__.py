"""The Flower ClientApp: one hospital with its data, its cache and its consent."""
