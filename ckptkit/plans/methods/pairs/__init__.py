"""Methods that choose or scale the elements of one model beside a base."""
