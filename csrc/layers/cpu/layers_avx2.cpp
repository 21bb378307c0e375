#define LEDOM_PATH(name) name##_avx2
#include "layers/cpu/layers_body.h"
