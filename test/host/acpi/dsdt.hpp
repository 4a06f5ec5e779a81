// The compiled DSDT that the program carries.
#pragma once
extern "C" const unsigned char firstlight_dsdt[];
extern "C" const unsigned char firstlight_dsdt_end[];
