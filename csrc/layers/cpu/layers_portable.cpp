#define LEDOM_PATH(name) name##_portable
#include "layers/cpu/layers_body.h"
