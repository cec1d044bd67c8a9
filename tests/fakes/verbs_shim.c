/* LD_PRELOAD: answers for devices that exist only in a fake sysfs tree, so that the real ibv_devinfo, and our own use of
 * libibverbs, can open them. Which devices there are, the real library finds out by itself. Numbers that sysfs has come
 * from there; those that it has not are fixed: vendor 0x02c9, MTU 4096 of 4096. */
#include <dirent.h>
#include <endian.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef ibv_query_port

static const char *text_of(struct ibv_context *context, const char *file) {
    static char found[256];
    char path[512];
    size_t length = 0;
    snprintf(path, sizeof path, "/sys/class/infiniband/%s/%s", context->device->name, file);
    FILE *handle = fopen(path, "r");
    if (handle) {
        length = fread(found, 1, sizeof found - 1, handle);
        fclose(handle);
    }
    while (length && found[length - 1] == '\n') length--;
    found[length] = 0;
    return found;
}

static long number_of(struct ibv_context *context, const char *file, int base) {
    return strtol(text_of(context, file), NULL, base);
}

static uint64_t guid_of(struct ibv_context *context, const char *file) {
    unsigned part[4] = {0};
    sscanf(text_of(context, file), "%x:%x:%x:%x", part, part + 1, part + 2, part + 3);
    return htobe64((uint64_t)part[0] << 48 | (uint64_t)part[1] << 32 | (uint64_t)part[2] << 16 | part[3]);
}

struct ibv_context *ibv_open_device(struct ibv_device *device) {
    struct ibv_context *context = calloc(1, sizeof *context);
    context->device = device;
    return context;
}

int ibv_close_device(struct ibv_context *context) {
    free(context);
    return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *told) {
    char path[512];
    memset(told, 0, sizeof *told);
    strncpy(told->fw_ver, text_of(context, "fw_ver"), sizeof told->fw_ver - 1);
    told->node_guid = guid_of(context, "node_guid");
    told->sys_image_guid = guid_of(context, "sys_image_guid");
    told->vendor_id = 0x02c9;
    told->vendor_part_id = number_of(context, "device/device", 0);
    told->hw_ver = number_of(context, "hw_rev", 16);
    snprintf(path, sizeof path, "/sys/class/infiniband/%s/ports", context->device->name);
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder));) told->phys_port_cnt += entry->d_name[0] != '.';
    if (folder) closedir(folder);
    return 0;
}

int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *into) {
    struct ibv_port_attr *told = (struct ibv_port_attr *)into;
    char file[64];
    told->max_mtu = told->active_mtu = IBV_MTU_4096;
#define PORT(name) (snprintf(file, sizeof file, "ports/%u/" name, port), file)
    told->state = number_of(context, PORT("state"), 0);
    told->phys_state = number_of(context, PORT("phys_state"), 0);
    told->lid = number_of(context, PORT("lid"), 0);
    told->sm_lid = number_of(context, PORT("sm_lid"), 0);
    told->lmc = number_of(context, PORT("lid_mask_count"), 0);
    const char *layer = text_of(context, PORT("link_layer"));
    told->link_layer = !strcmp(layer, "Ethernet") ? IBV_LINK_LAYER_ETHERNET
                     : !strcmp(layer, "InfiniBand") ? IBV_LINK_LAYER_INFINIBAND : IBV_LINK_LAYER_UNSPECIFIED;
    return 0;
}
